"""What `jax.export` needs to serialise functions of this package's types; their names are part of what it writes."""

from __future__ import annotations

import json
from typing import Any

from jax import export

from jaxmoe.arguments import Columns
from jaxmoe.dispatch import DispatchPlan
from jaxmoe.layer import MoEParams
from jaxmoe.routing import Routing
from jaxmoe.shared import SharedMLP


def _to_bytes(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _from_bytes(text: bytes) -> tuple[Any, ...]:
    return tuple(json.loads(text))


for _dataclass in (Columns, MoEParams, SharedMLP):
    export.register_pytree_node_serialization(
        _dataclass,
        serialized_name=f"jaxmoe.{_dataclass.__name__}",
        serialize_auxdata=_to_bytes,
        deserialize_auxdata=_from_bytes,
    )
for _named_tuple in (DispatchPlan, Routing):
    export.register_namedtuple_serialization(_named_tuple, serialized_name=f"jaxmoe.{_named_tuple.__name__}")
