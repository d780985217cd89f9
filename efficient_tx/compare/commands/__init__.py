"""The commands: one module each, with HELP, `add_flags(parser)`, `check(args)` and `run(args, console)`."""

from types import ModuleType

from efficient_tx.compare.commands import attention, compression, decode, linear, table

COMMANDS: dict[str, ModuleType] = {
    "attention": attention,
    "linear": linear,
    "decode": decode,
    "compression": compression,
    "table": table,
}
