"""The adapter module of the installed release: the one place that asks which release that is.

Rooms take from ``release`` what is spelt or done differently in different releases. Every module has the same names:

| name                  | what                                                                                |
|-----------------------|-------------------------------------------------------------------------------------|
| ``ManagerBase``       | upstream's manager of adapters, by the names that this release calls                |
| ``CacheBase``         | upstream's radix cache, and the calls into it that this release alone has           |
| ``matched_tokens``    | tokens of a match, ``without_weights`` the match without its first ones             |
| ``behind_weights``    | parameters of an insert whose key is longer by an adapter's weights                 |
| ``tp_rank_of``        | a linear's TP rank                                                                  |
| ``uses_dp_attention`` | whether DP attention is on                                                          |
| ``unsupported``       | what only this release can be told and cannot be served                             |
| ``FUSED_LINEARS``     | functions that say whether a linear is computed past its quant method               |
| ``ATTRIBUTES``        | attributes that the module uses where no type is declared (``porting/``)            |
"""

from __future__ import annotations

import importlib
from types import ModuleType

from blocklora_patches.releases.contract import compared_with

release: ModuleType = importlib.import_module(f"{__package__}.v{compared_with().replace('.', '_')}")
