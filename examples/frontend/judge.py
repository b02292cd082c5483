"""A judge: several adapters answer, and one adapter (or the base model) selects the best answer.

python examples/frontend/judge.py --adapters sql support legal --judge critic
"""

from __future__ import annotations

import argparse

from sglang_blocklora import frontend as sgl


@sgl.function
def judge(s, question, adapters, judge):
    s += "Question: " + question + "\n"
    branches = s.fork(len(adapters))
    for branch, adapter in zip(branches, adapters, strict=True):
        branch += "Answer: " + sgl.gen("answer", max_tokens=48, stop="\n", adapter=adapter)
    for branch, adapter in zip(branches, adapters, strict=True):
        s += adapter + " says: " + branch["answer"] + "\n"
    s += "The best answer is by " + sgl.select("best", choices=adapters, adapter=judge)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--judge", default=None, help="adapter that judges (default: the base model)")
    parser.add_argument("--question", default="How many orders were there last week?")
    arguments = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(arguments.url))
    state = judge.run(question=arguments.question, adapters=arguments.adapters, judge=arguments.judge)
    print(state.text())
    print(f"winner: {state['best']}")


if __name__ == "__main__":
    main()
