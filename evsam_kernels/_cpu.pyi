"""Types of the extension module that python/cpu.cpp binds."""

def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def layer_norm_2d(
    *,
    x: int,
    y: int,
    weight: int | None,
    bias: int | None,
    rows: int,
    channels: int,
    eps: float,
    dtype: str,
    num_threads: int,
) -> None: ...
