"""Properties of the checks by themselves: each takes random numbers, makes one case and asserts what must hold."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from sglang_blocklora.adapters.config import CONFIG_NAME, parse_config, read_config
from sglang_blocklora.adapters.content_hash import content_hash
from sglang_blocklora.adapters.errors import AdapterError
from sglang_blocklora.adapters.loading import read_adapter
from sglang_blocklora.adapters.weights_file import WeightsFile
from sglang_blocklora.memory.prefix import are_token_ids, request_key, salted_tokens, split_key
from sglang_blocklora.naming.folders import AdapterFolders
from sglang_blocklora.naming.model_names import UnknownModel, reason_not_to_name, resolve_model
from sglang_blocklora.requests.adapter_names import check_adapter_names
from sglang_blocklora.requests.token_ids import check_text_or_token_ids, check_token_id_keys, check_token_ids
from sglang_blocklora.requests.values import BadRequest, check_range, check_types

from blocklora_testing.fuzz import cases
from blocklora_testing.toy import ToyModel, write_adapter

VOCABULARY = 151_936
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj")
KEYS = ("0" * 32, "32:", ":", "1:a", "-1:", "99999999999999999999:", "\u0663:abc", "00:")
MESSAGE = 2000  # letters at most, whatever was found
WORDS = (
    "sql",
    "legal",
    "a b",
    "ünï",
    "link-in",
    "link-out",
    "link-loop",
    "file",
    ".hidden",
    "deep",
    "nested",
    "outside",
)
UNFORESEEN = "while loading on TP rank"  # in the message of a failure that no check foresaw
CONFIG = {
    "peft_type": "LORA",
    "r": 6,
    "lora_alpha": 16,
    "bias": "none",
    "target_modules": ["q_proj", "o_proj"],
    "rank_pattern": {"q_proj": 3},
    "alpha_pattern": {"o_proj": 5},
    "use_rslora": False,
    "use_bdlora": {
        "target_modules_bd_a": ["o_proj"],
        "target_modules_bd_b": ["q_proj"],
        "nblocks": 3,
        "match_strict": True,
    },
    "modules_to_save": None,
    "init_lora_weights": True,
}


class Validators:
    """Over a folder with adapters, links and traps in it: ``properties`` by name, and the share of cases of each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._root = self._folder / "root"
        self._model = ToyModel(layers=1)
        self._spec = self._model.spec(0, 1, torch.float32)
        self._build()
        self.properties: dict[str, tuple[int, Callable[[Random], None]]] = {
            "model names": (30, self.model_name),
            "names of folders": (20, self.folder_name),
            "paths to load": (15, self.path),
            "extra keys": (10, self.request_key),
            "salted tokens": (10, self.prefix),
            "adapter_config.json": (15, self.config),
            "adapter_config.json, files": (5, self.config_file),
            "headers of weights": (5, self.header),
            "token ids": (15, self.token_ids),
            "values of requests": (10, self.values),
        }

    def _build(self) -> None:
        (self._root / "nested").mkdir(parents=True)
        for name in ("sql", "a b", "ünï", ".hidden", "nested/deep"):
            write_adapter(self._root / name, self._model, targets=("q_proj", "o_proj"))
        for seed, folder in ((1, self._folder / "outside"), (2, self._root / "legal")):
            write_adapter(folder, self._model, targets=("q_proj", "o_proj"), seed=seed)
        (self._root / "file").write_text("")
        (self._root / "link-in").symlink_to("sql")
        (self._root / "link-out").symlink_to(self._folder / "outside")
        (self._root / "link-loop").symlink_to("link-loop")
        (self._root / "legal" / "extra").symlink_to("/etc/passwd")
        self._scratch = self._folder / "scratch"
        self._scratch.mkdir()
        self._folders = AdapterFolders((self._root,))
        self._allowed = content_hash(self._root / "sql")

    def model_name(self, rng: Random) -> None:
        """A name is the base model, or an adapter it names whole or behind a prefix; all else is unknown."""
        base = rng.choice(("llama", "org/llama", "a:b", cases.text(rng) or "x"))
        texts = {cases.text(rng, (*WORDS, f"{base}:x", "default:x", base)) for _ in range(rng.randint(0, 4))}
        loaded = {name for name in texts if reason_not_to_name(name, base, "default") is None}
        known = (*WORDS, *loaded, base, "default", f"{base}:", "default:")
        model = cases.text(rng, known)
        for name in loaded:
            for asked in (name, f"{base}:{name}"):
                assert resolve_model(asked, base, "default", loaded) == name, "a loaded adapter is not found"
        try:
            found = resolve_model(model, base, "default", loaded)
        except UnknownModel:
            assert model not in (base, "default", *loaded), "a known name is unknown"
            return
        if found is None:
            assert model in (base, "default"), "the base model answers for another name"
            return
        assert found in loaded, "an adapter that is not there"
        assert model in (found, f"{base}:{found}", f"default:{found}"), "an adapter of another name"

    def folder_name(self, rng: Random) -> None:
        """What a name finds is a folder directly below the root, and nothing that leads out of it."""
        name = cases.text(rng, WORDS) if rng.random() < 0.7 else cases.path(rng, WORDS)
        found = self._folders.find(name)
        if found is not None:
            assert str(found).startswith(f"{self._root}/"), f"{found} is not below {self._root}"
            assert "/" not in name
            assert not name.startswith(".")
            assert (found / CONFIG_NAME).is_file()
            assert os.path.realpath(self._root / name) == str(found)
        assert (found is not None) or name not in ("sql", "legal", "a b", "ünï", "link-in"), "not found"

    def path(self, rng: Random) -> None:
        """Only bytes that lie below the root with all of their folder are read; all else is a refusal in words."""
        start = rng.choice((str(self._root), str(self._folder), "", f"{self._root}/sql"))
        where = start + "/" + cases.path(rng, WORDS) if rng.random() < 0.9 else cases.path(rng, WORDS)
        report, _ = read_adapter("fuzzed", where, self._spec, 64, str(self._root))
        if report.error is None:
            assert report.content_hash == self._allowed, f"{where!r} is not below {self._root} with all its files"
            return
        assert UNFORESEEN not in report.error, report.error
        assert "fuzzed" in report.error

    def request_key(self, rng: Random) -> None:
        """A client's extra key cannot be taken for an adapter, nor one request for another."""
        pairs = []
        for _ in range(2):
            lora_id = rng.choice((None, f"{rng.getrandbits(128):032x}"))
            first = rng.choice((None, 0, rng.randrange(10**8))) if lora_id else None
            pairs.append((lora_id, cases.text(rng, KEYS) or None, first))
        keys = [request_key(*pair) for pair in pairs]
        assert [split_key(key) for key in keys] == pairs
        assert (keys[0] == keys[1]) == (pairs[0] == pairs[1])
        text = cases.text(rng, (*KEYS, *(key for key in keys if key)))
        try:
            pair = split_key(text)
        except ValueError:
            return
        assert request_key(*pair) == text, "a key that nobody made"

    def prefix(self, rng: Random) -> None:
        """Salted tokens keep their ids, are no ids, begin alike for longer prompts, and differ for other salts."""
        tokens = array("q", [rng.choice((0, VOCABULARY - 1, rng.randrange(VOCABULARY))) for _ in range(20)])
        salts = [(cases.text(rng, KEYS) or None, cases.text(rng, KEYS) or None) for _ in range(2)]
        salted = [salted_tokens(tokens, *salt) for salt in salts]
        for salt, keys in zip(salts, salted, strict=True):
            assert [key & 0xFFFFFFFF for key in keys] == list(tokens), "ids were lost"
            assert are_token_ids(keys) == (salt == (None, None)), "salted tokens that could be ids"
            assert all(key >= 0 for key in keys)
            cut = rng.randrange(20)
            assert salted_tokens(tokens[:cut], *salt) == keys[:cut]
        assert (salted[0][:8] == salted[1][:8]) == (salts[0] == salts[1]), f"two salts, one place: {salts!r:.300}"
        wrong = cases.number(rng)
        if not 0 <= wrong < 2**32 and -(2**63) <= wrong < 2**63:
            assert not are_token_ids(array("q", [*tokens[:3], wrong]))

    def token_ids(self, rng: Random) -> None:
        """What passes is a list of integers of the vocabulary; all else is refused in words that name the field."""
        ids: Any = [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 5))]
        for _ in range(rng.choice((0, 1, 1, 2))):
            ids.insert(rng.randint(0, len(ids)), rng.choice((cases.number(rng), cases.value(rng))))
        ids = cases.value(rng) if rng.random() < 0.1 else ids
        check = rng.choice((check_token_ids, check_text_or_token_ids))
        sound = isinstance(ids, list) and all(type(one) is int and 0 <= one < VOCABULARY for one in ids)
        if check is check_text_or_token_ids and not sound:
            sound = self._text_or_ids(ids)
        assert sound == self._passes(lambda: check("field", ids, VOCABULARY)), f"{ids!r:.200} in {check.__name__}"

    def _text_or_ids(self, value: Any) -> bool:
        """By the definition: none, a text, or a list of texts and lists of ids that begins with one of them."""
        if value is None or isinstance(value, str):
            return True
        if not isinstance(value, list) or not value or not isinstance(value[0], str | list):
            return False
        inner = [one for one in value if not isinstance(one, str)]
        return all(
            isinstance(one, list) and all(type(id_) is int and 0 <= id_ < VOCABULARY for id_ in one) for one in inner
        )

    def values(self, rng: Random) -> None:
        """Names of adapters, keys of mappings and numbers: what passes has the type, and words tell what does not."""
        value = cases.value(rng, WORDS)
        named = value is None or (isinstance(value, str) and value != "")
        many = isinstance(value, list) and all(one is None or (isinstance(one, str) and one) for one in value)
        assert self._passes(lambda: check_adapter_names("field", value)) == (named or many), f"{value!r:.200}"
        low, high = sorted((cases.number(rng), cases.number(rng)))
        within = type(value) is int and low <= value <= high
        assert self._passes(lambda: check_range("field", value, low, high)) == within
        if self._passes(lambda: check_token_id_keys("field", value, VOCABULARY)):
            assert all(0 <= int(key) < VOCABULARY for key in value)
        self._passes(lambda: check_types("field", value, {"a": int, "sql": str | None, "default": list[int]}))

    def _passes(self, check: Callable[[], None]) -> bool:
        try:
            check()
        except BadRequest as error:
            words = str(error)
            assert "field" in words
            assert len(words) < MESSAGE
            words.encode()  # it can be sent
            return False
        return True

    def config(self, rng: Random) -> None:
        """A config is understood, with values that make sense, or refused in words."""
        known = (*CONFIG, "use_dora", "lora_bias", "q_proj", "o_proj", "LORA", "none", "(", "[a[", "(a*)*b", ".*")
        raw = cases.mutated(rng, CONFIG, known)
        try:
            found = parse_config("fuzzed", raw)
            for module in MODULES:
                assert found.rank_of(module) >= 1
                assert math.isfinite(found.scaling_of(module))
                found.structure_of("fuzzed", module)
                found.targets.selects(module)
        except AdapterError as error:
            self._in_words(error)
            return
        assert raw["peft_type"] == "LORA"
        assert not any(raw.get(key) for key in ("use_dora", "lora_bias", "modules_to_save")), "served as if it were not"

    def config_file(self, rng: Random) -> None:
        """The same from a file, which may be no JSON and no text."""
        (self._scratch / CONFIG_NAME).write_bytes(cases.body(rng, CONFIG, tuple(CONFIG)))
        try:
            read_config("fuzzed", self._scratch)
        except AdapterError as error:
            self._in_words(error)

    def _in_words(self, error: AdapterError) -> None:
        words = str(error)
        assert len(words) < MESSAGE
        assert "fuzzed" in words

    def header(self, rng: Random) -> None:
        """A weights file is whole, and then each tensor can be read, or it is refused."""
        tensors = {"m.lora_A.weight": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}
        header = cases.body(rng, tensors, ("dtype", "shape", "data_offsets", "F16", "BF16", "__metadata__", "I64"))
        length = len(header) if rng.random() < 0.9 else abs(cases.number(rng)) % 2**64
        file = self._scratch / "weights"
        file.write_bytes(length.to_bytes(8, "little") + header + bytes(rng.choice((0, 47, 48, 49, 100))))
        try:
            weights = WeightsFile(file)
        except (OSError, ValueError):
            return
        try:
            for name, stored in weights.tensors.items():
                assert isinstance(stored.start, int)
                if stored.dtype in ("F32", "F16", "BF16") and len(stored.shape) == 2:
                    assert weights.read(name, None, None).shape == stored.shape
        finally:
            weights.close()
