"""What a server imports, made ready once: the processes that ``warm.py`` forks have it already."""

from sglang_blocklora import cpu_only

cpu_only.prepare_import()

import blocklora_patches.launch  # noqa: E402, F401
import sglang.srt.entrypoints.http_server  # noqa: E402
import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402, F401
