"""A server whose adapters lie in an S3 bucket and on a web server; expected tokens are PEFT's."""

from __future__ import annotations

import shutil
from pathlib import Path

from blocklora_testing.case import NEW_TOKENS, Case
from blocklora_testing.server import running
from blocklora_testing.stores import s3_store, web_store


def test_adapters_are_fetched_when_a_request_names_them_or_a_load_their_url(api_case: Case, tmp_path: Path) -> None:
    prompt, expected = api_case.prompts[1], api_case.expected
    shutil.copytree(api_case.adapters["n2"], tmp_path / "web" / "n2")
    with s3_store() as s3, web_store(tmp_path / "web") as web:
        s3.put("n8", api_case.adapters["n8"])
        flags = ["--tp", "2", "--adapter-dir", s3.url, "--adapter-root", s3.url, "--adapter-root", web.url]
        flags += ["--adapter-cache-dir", str(tmp_path / "cache"), "--max-loaded-loras", "1"]
        (tmp_path / "cache").mkdir()
        with running(
            api_case.model, *flags, log=tmp_path / "log", environment=dict(s3.environment), warm=True
        ) as server:
            models = {one["id"]: one["root"] for one in server.call("/v1/models")[1]["data"]}
            assert models["n8"] == f"{s3.url}/n8"
            assert server.tokens(prompt, "n8", NEW_TOKENS) == expected["n8"][1]
            body = {"lora_name": "n2", "lora_path": f"{web.url}/n2"}
            assert server.call("/v1/load_lora_adapter", body)[0] == 200
            assert server.tokens(prompt, "n2", NEW_TOKENS) == expected["n2"][1]
            listed = {one["name"]: one for one in server.call("/adapters")[1]["data"]}
            assert {name: one["path"] for name, one in listed.items()} == {
                "n8": f"{s3.url}/n8",
                "n2": f"{web.url}/n2",
            }
            s3.put("n8", api_case.adapters["n4"])
            assert server.tokens(prompt, "n8", NEW_TOKENS) == expected["n4"][1], "n2 put it out, and it changed"
            body = {"lora_name": "x", "lora_path": str(api_case.adapters["n8"])}
            status, answer = server.call("/v1/load_lora_adapter", body)
            assert (status, "--adapter-root" in str(answer)) == (400, True), "no folder is below a URL"
            assert server.log_text().count("fetching") == 3
