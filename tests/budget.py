"""What a notebook may cost in arithmetic, which is the same on every machine.

A kernel that tests start counts what its convolutions and dense layers do, wherever a network is
called: in training, in attacks, in benchmarks. A multiplication and an addition are two operations;
going backward through a layer counts as twice going forward. All else is left out: activations,
pooling, sums over windows, the weights' updates, a gradient's own gradient. So the count is no
measure of time; but longer training, more steps of an attack or a wider network raise it.

PyTorch's hooks count: 2% of the time of PGD on 100 digits. A mode that looks at every operation, as
`FlopCounterMode`, would be exact, and doubles that time.
"""

from pathlib import Path

# What a run was counted at, and 30% more: lower it with the run. Who raises one says why.
GFLOP = {
    "adversarial_training": 1155,  # a step of a ResNet-152 of 64 pixels, for its bill
    "attack": 6,
    "attacks": 1514,
    "batchout": 530,
    "compact_convolution": 1105,
    "jacobian_regularization": 248,
    "performance": 0,
    "prototype_conformity": 1385,
    "reevaluation": 592,  # balls, transfer and other weights, live
    "verdicts": 0,
}
# IPython runs it as the kernel starts. It waits for the first cell, for to import PyTorch takes
# long on a busy machine, and a kernel that starts slowly is taken for a dead one.
STARTUP = """
def count(file):
    def start(_):
        from torch import nn

        def add(operations):
            nonlocal total
            total += operations

        def forward(layer, _, out):
            if isinstance(layer, nn.Conv2d | nn.Linear):
                cost = 2 * out.numel() * (layer.weight.numel() // len(layer.weight))
                add(cost)
                if out.requires_grad:
                    out.register_hook(lambda _: add(2 * cost))

        total = 0
        nn.modules.module.register_module_forward_hook(forward)
        events.unregister("pre_run_cell", start)
        events.register("post_run_cell", lambda _: file.write_text(str(total)))

    events = get_ipython().events
    events.register("pre_run_cell", start)


count(__import__("pathlib").Path({file!r}))
del count
"""


def counting(folder: Path) -> dict[str, str]:
    """The environment in which a kernel counts, for `counted` of the same folder."""
    startup = folder / "profile_default" / "startup" / "count.py"
    startup.parent.mkdir(parents=True)
    startup.write_text(STARTUP.format(file=str(folder / "operations")))
    return {"IPYTHONDIR": str(folder)}


def counted(folder: Path) -> int:
    """The operations of the notebook that was run with `counting`."""
    return int((folder / "operations").read_text())


def keeps_its_budget(name: str, operations: int) -> None:
    spent, bound = operations / 1e9, GFLOP[name]
    assert spent <= bound, f"{name}: {spent:.1f} GFLOP at quick; the budget is {bound} (budget.py)"
