"""A router: the base model says which adapter a question is for, and that adapter answers.

python examples/frontend/router.py --adapters sql support legal
"""

from __future__ import annotations

import argparse

from sglang_blocklora import frontend as sgl


@sgl.function
def route(s, question, adapters):
    s += "Experts: " + ", ".join(adapters) + ".\nQuestion: " + question + "\nThe best expert is "
    s += sgl.select("expert", choices=adapters)
    s += ".\nTheir answer: "
    s += sgl.gen("answer", max_tokens=64, stop="\n", adapter=s["expert"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:30000")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--question", default="How many orders were there last week?")
    arguments = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(arguments.url))
    state = route.run(question=arguments.question, adapters=arguments.adapters, temperature=0)
    print(f"{state['expert']}: {state['answer']}")


if __name__ == "__main__":
    main()
