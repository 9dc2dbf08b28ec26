"""What persona sees of this plugin before anybody uses it: one line, and where the method is. Nothing heavy here: this
file is imported for `persona --help`."""

from persona import Descriptor, hookimpl


@hookimpl
def persona_methods() -> list[Descriptor]:
    """The method this plugin gives."""
    return [
        Descriptor(
            "cross-attention",
            "Only how words are read: keys and values of cross-attention",
            "persona_plugin_cross_attention.method:CrossAttention",
        )
    ]
