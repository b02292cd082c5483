"""Keys of adapter_config.json that change what an adapter computes are ignored in silence."""

from __future__ import annotations

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
CHANGES = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"q_proj": 32},
    "use_bdlora": {"nblocks": 2, "target_modules_bd_a": [], "target_modules_bd_b": ["q_proj"]},
    "alora_invocation_tokens": [5],
    "lora_bias": True,
    "bias": "all",
    "fan_in_fan_out": True,
}


def fault() -> str | None:
    from sglang.srt.lora.lora_config import LoRAConfig

    def kept(**changes: object) -> dict[str, object]:
        """What is made of a config, but for the config itself."""
        return {
            name: value for name, value in vars(LoRAConfig.from_dict(CONFIG | changes)).items() if name != "hf_config"
        }

    ignored = []
    for key, value in CHANGES.items():
        try:
            ignored += [key] if kept(**{key: value}) == kept() else []
        except Exception:  # refused, which is what we ask for
            continue
    return f"ignored: {', '.join(ignored)}" if ignored else None


if __name__ == "__main__":
    print(fault() or "mended")
