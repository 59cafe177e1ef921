"""What a training record keeps of one example at one moment: numbers computed from its logits.

    prediction        class with the largest logit; all others are stored as float16
    true_probability  softmax probability of the true class
    margin            logit of the true class minus the largest other logit
    error_norm        L2 norm of softmax minus one-hot label (EL2N, Paul et al. 2021)
    loss              cross entropy, nats
    entropy           entropy of the softmax, nats
    change            KL divergence from the previous recorded epoch's softmax to this one's, nats
    gradient_norm     L2 norm of the loss gradient with respect to all parameters (GraNd)

Pure tensors. What this module does not know: models, epochs, files.
"""

from __future__ import annotations

import torch

LARGEST = 60_000.0  # float16 ends at 65,504


def from_logits(
    logits: torch.Tensor, labels: torch.Tensor, previous: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Every statistic but gradient_norm, each (..., n), of logits (..., n, c) and labels (n,).

    `previous` are the logits of the epoch before, same shape; without them `change` is 0.
    """
    logits = logits.float()
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    at_label = labels.expand(logits.shape[:-1]).unsqueeze(-1)  # (..., n, 1)
    true_logit = logits.gather(-1, at_label).squeeze(-1)
    others = logits.scatter(-1, at_label, -torch.inf)
    p_true = probabilities.gather(-1, at_label).squeeze(-1)
    # sum (p - y)^2 = sum p^2 - 2 p_y + 1, written so that nothing cancels when p_y is near 1
    squares = probabilities.scatter(-1, at_label, 0.0).square().sum(-1) + (1 - p_true).square()
    change = torch.zeros_like(p_true)
    if previous is not None:
        before = previous.float().log_softmax(-1)
        change = (probabilities * (log_probabilities - before)).sum(-1).clamp_min(0)
    return {
        "prediction": logits.argmax(-1),
        "true_probability": p_true,
        "margin": (true_logit - others.amax(-1)).clamp(-LARGEST, LARGEST),
        "error_norm": squares.sqrt(),
        "loss": (-log_probabilities.gather(-1, at_label).squeeze(-1)).clamp_max(LARGEST),
        "entropy": -(probabilities * log_probabilities).sum(-1),
        "change": change.clamp_max(LARGEST),
    }
