"""Optimizers of other packages, as data: which class, which package gives it, which keywords it has."""

from __future__ import annotations

from persona.core.host.contracts import OptimizerChoice

ADAMW_8BIT = OptimizerChoice(
    package="bitsandbytes",
    install="pip install bitsandbytes",
    classes={"torch": "bitsandbytes.optim:AdamW8bit"},
    keywords={"betas": "betas", "epsilon": "eps", "weight_decay": "weight_decay"},
)
"""AdamW with its moments in 8 bits (arXiv 2110.02861): a quarter of the optimizer's memory."""

PRODIGY = OptimizerChoice(
    package="prodigyopt",
    install="pip install prodigyopt",
    classes={"torch": "prodigyopt:Prodigy"},
    keywords={"betas": "betas", "epsilon": "eps", "weight_decay": "weight_decay"},
    constants={"use_bias_correction": True, "safeguard_warmup": True},
    learning_rate=1.0,
)
"""Finds its step size itself (arXiv 2306.06101); --learning-rate multiplies it and is 1."""

LION = OptimizerChoice(
    package="lion_pytorch",
    install="pip install lion-pytorch",
    classes={"torch": "lion_pytorch:Lion"},
    keywords={"betas": "betas", "weight_decay": "weight_decay"},
    constants={"betas": [0.9, 0.99]},
)
"""The sign of the momentum (arXiv 2302.06675): half of AdamW's memory, a third to a tenth of its learning rate."""

ADAFACTOR = OptimizerChoice(
    package="transformers",
    install='pip install "persona[torch]"',
    classes={"torch": "transformers.optimization:Adafactor"},
    keywords={"weight_decay": "weight_decay"},
    constants={"scale_parameter": False, "relative_step": False, "warmup_init": False},
)
"""Second moments as rows and columns (arXiv 1804.04235): hardly any memory. The learning rate is the one that is told,
as kohya's documents advise; --optimizer-option relative_step=true gives it its own."""
