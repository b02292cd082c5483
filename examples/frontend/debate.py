"""A debate: each adapter argues in a branch of its own, and the base model sums up.

python examples/frontend/debate.py --adapters optimist pessimist engineer
"""

from __future__ import annotations

import argparse

from sglang_blocklora import frontend as sgl


@sgl.function
def debate(s, motion, adapters, rounds):
    s += "Motion: " + motion + "\n"
    for _ in range(rounds):
        branches = s.fork(len(adapters))
        for branch, adapter in zip(branches, adapters, strict=True):
            branch += adapter + ": " + sgl.gen("speech", max_tokens=48, stop="\n", adapter=adapter)
        for branch, adapter in zip(branches, adapters, strict=True):
            s += adapter + ": " + branch["speech"] + "\n"
    s += "Summary: " + sgl.gen("summary", max_tokens=64, stop="\n", adapter=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--motion", default="Every meeting should be a letter.")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(arguments.url))
    print(debate.run(motion=arguments.motion, adapters=arguments.adapters, rounds=arguments.rounds).text())


if __name__ == "__main__":
    main()
