"""DPO losses and rewards from log-probs. The losses are defined as in TRL 0.25.1."""

import torch
import torch.nn.functional as F

LABEL_SMOOTHING = 0.1
FORMULAS = {
    "h": "(policy_chosen - policy_rejected) - (reference_chosen - reference_rejected), all summed log-probs",
    "sigmoid": "-log sigmoid(beta h)",
    "sigmoid_smoothed": f"-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), s = {LABEL_SMOOTHING}",
    "hinge": "max(0, 1 - beta h)",
    "ipo": "(h - 1 / (2 beta))^2",
    "ipo_mean": "the same, each log-prob divided by its answer's number of tokens first: what TRL does for ipo",
}


def losses(policy: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor], beta: float,
           lengths: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses by name, each [n_pairs], from (chosen, rejected) log-probs, each [n_pairs]."""
    h = (policy[0] - policy[1]) - (reference[0] - reference[1])
    h_mean = (policy[0] - reference[0]) / lengths[0] - (policy[1] - reference[1]) / lengths[1]
    return {
        "sigmoid": -F.logsigmoid(beta * h),
        "sigmoid_smoothed":
            -F.logsigmoid(beta * h) * (1 - LABEL_SMOOTHING) - F.logsigmoid(-beta * h) * LABEL_SMOOTHING,
        "hinge": torch.relu(1 - beta * h),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "ipo_mean": (h_mean - 1 / (2 * beta)) ** 2,
    }


def rewards(policy: tuple[torch.Tensor, torch.Tensor], reference: tuple[torch.Tensor, torch.Tensor],
            beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards of the chosen and the rejected answers, each [n_pairs]."""
    return beta * (policy[0] - reference[0]), beta * (policy[1] - reference[1])
