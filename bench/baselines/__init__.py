"""Other people's methods, as classes that `method:` of a run can name."""

BASELINES = {
    "frozen": "bench.baselines.frozen:Frozen",
    "lora": "bench.baselines.lora:LoRA",
    "osf": "bench.baselines.osf:OSF",
    "olora": "bench.baselines.olora:OLoRA",
    "ewc": "bench.baselines.ewc:EWC",
    "l2sp": "bench.baselines.l2sp:L2SP",
}
"""Short names, for the commands of this folder."""
