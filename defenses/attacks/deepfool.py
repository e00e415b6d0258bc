"""DeepFool in L2: walk to the nearest of the linearized class boundaries, and again.

Moosavi-Dezfooli, Fawzi & Frossard (2016), Alg. 2; the max-residue-ratio is Eq. 8 of Ranjan et al.
(2018).
"""

import torch
from torch import Tensor, nn

from .contract import Logits, attacking, check_count, input_gradient, relative_norm

# Our choice: at a tie, or close to a boundary that bends away, a shorter step would get lost in the
# rounding of the image. (The authors' code adds 1e-4 to every |f_k|.)
SHORTEST_STEP = 1e-4


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    max_residue_ratio: float | None = None,
) -> Tensor:
    """DeepFool, untargeted, L2.

    The image that each step judges is the one that would be returned: overshot and clipped to
    [0, 1]. The image leaves the batch as soon as that fools the model.

    Parameters
    ----------
    model : nn.Module
        Maps images in [0, 1] to logits (N, K); normalizes inside.
    x : Tensor
        Images (N, C, H, W), float32 or float64, in [0, 1].
    y : Tensor, optional
        Labels int64 (N,); without them, the model's own predictions.
    steps : int
        Linearizations at most.
    overshoot : float
        The perturbation is stretched by 1 + overshoot, to end beyond the boundary.
    candidates : int
        Classes considered: those with the highest logits at `x`, the predicted one among them.
    max_residue_ratio : float, optional
        d: a perturbation with ‖η‖₂ > d·‖x‖₂ does not count (Eq. 8). The path does not depend on
        d, so one run without it answers for every d; see `defenses.evaluation.accuracy_within`.

    Returns
    -------
    Tensor
        Images like `x`, in [0, 1]: misclassified, or unchanged, where `x` was misclassified
        before or could not be fooled.

    Raises
    ------
    ValueError
        For images, labels, options or a model that break the above, each with the remedy.
    """
    check_count("steps", steps)
    check_count("candidates - 1", candidates - 1)
    if not overshoot >= 0:
        raise ValueError(f"overshoot is {overshoot}, expected >= 0")
    if max_residue_ratio is not None and not max_residue_ratio >= 0:
        raise ValueError(f"max_residue_ratio is {max_residue_ratio}, expected >= 0 or None")
    with attacking(model, x, y) as logits_of:
        x = x.detach()
        x_adv, x_i = x.clone(), x
        rows = torch.arange(len(x), device=x.device)
        k_0 = classes = rows  # set by the first forward pass
        for step in range(steps + 1):
            if not len(rows):
                break
            with torch.no_grad():
                logits = logits_of(x_i)
            if step == 0:
                k_0 = logits.argmax(dim=1)
                classes = logits.topk(min(candidates, logits.shape[1]), dim=1).indices[:, 1:]
                left = torch.ones_like(k_0, dtype=torch.bool) if y is None else k_0 == y
            else:
                left = logits.argmax(dim=1) == k_0
                x_adv[rows[~left]] = x_i[~left]
            rows, x_i, k_0, classes = rows[left], x_i[left], k_0[left], classes[left]
            if step < steps and len(rows):
                r_i = _to_nearest_boundary(logits_of, x_i, k_0, classes)
                x_i = (x_i + (1 + overshoot) * r_i).clamp(0, 1)
                moved = r_i.flatten(1).any(dim=1)
                rows, x_i, k_0, classes = rows[moved], x_i[moved], k_0[moved], classes[moved]
    if max_residue_ratio is not None:
        too_far = relative_norm(x_adv, x) > max_residue_ratio
        x_adv[too_far] = x[too_far]
    return x_adv


def _to_nearest_boundary(logits_of: Logits, x_i: Tensor, k_0: Tensor, classes: Tensor) -> Tensor:
    """Lines 6 to 9 of Alg. 2: the shortest r with f_k + w_k·r = 0 for one class k."""
    x_i = x_i.detach().requires_grad_()
    logits = logits_of(x_i)
    f_0 = logits.gather(1, k_0[:, None]).squeeze(1)
    diagonal = x_i[0].numel() ** 0.5  # of the box [0, 1]: no step need be longer
    shortest = logits.new_full((len(x_i),), torch.inf)
    r = torch.zeros_like(x_i)
    for k in classes.T:
        f_k = logits.gather(1, k[:, None]).squeeze(1) - f_0
        w_k = input_gradient(f_k, x_i, keep_graph=True)
        norm = torch.linalg.vector_norm(w_k, dim=(1, 2, 3), dtype=torch.float64)
        distance = (f_k.detach().abs() / norm).clamp(min=SHORTEST_STEP)
        nearer = distance < shortest
        r_k = w_k / _per_image(norm.to(x_i.dtype)) * _per_image(distance.clamp(max=diagonal))
        r = torch.where(_per_image(nearer), r_k.to(x_i.dtype), r)
        shortest = torch.where(nearer, distance, shortest)
    return r


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
