"""BatchNorm over all ranks on the CPU, where torch's SyncBatchNorm refuses to run."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from trainer import distributed


class _NormaliseOverRanks(torch.autograd.Function):
    """x -> (x - mean) / sqrt(var + eps) * weight + bias, with the mean and variance of all ranks' rows."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, axes, correction=0)
        count = torch.full_like(mean, x.numel() / x.shape[1])
        every = distributed.gather_equal_rows(torch.stack([mean, var, count])[None])  # (W, 3, C)
        means, variances, counts = every.unbind(1)
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean) ** 2) * counts).sum(0) / total  # parallel variance, Chan et al. 1979
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        ctx.eps = eps  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(mean, var, total)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var, total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, inverse_std, total = ctx.saved_tensors  # type: ignore[attr-defined]
        shape = [1, -1] + [1] * (x.ndim - 2)
        axes = [axis for axis in range(x.ndim) if axis != 1]
        grad_bias = gradient.sum(axes)
        grad_weight = (torch.einsum("bc...,bc...->c", gradient, x) - mean * grad_bias) * inverse_std
        sums = torch.stack([grad_bias, grad_weight])
        if distributed.world() > 1:
            dist.all_reduce(sums)
        sum_gradient, sum_gradient_xhat = sums / total
        # dx = w s (g - E[g] - xhat E[g xhat]), regrouped as a g + b x + c with one value a channel each
        scale = weight * inverse_std
        slope = -scale * sum_gradient_xhat * inverse_std
        offset = -scale * sum_gradient - slope * mean
        grad_x = torch.addcmul(offset.view(shape), x, slope.view(shape)).addcmul_(gradient, scale.view(shape))
        return grad_x, grad_weight, grad_bias, None


def statistics_of_this_rank(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of BatchNorms that count this rank's rows only, under the module's names; live, not copied."""
    return {
        f"{prefix}{'.' if prefix else ''}{name}": buffer
        for prefix, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, SyncBatchNorm | nn.SyncBatchNorm)
        for name, buffer in norm.named_buffers(recurse=False)
    }


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose batch statistics are those of all ranks together; equal to BatchNorm in one process.

    Works on (B, C) and (B, C, H, W), with gloo, in every ZeRO stage; keeps the parameter and buffer names of BatchNorm.
    """

    def __init__(self, num_features: int, *, eps: float, momentum: float, drop: nn.Module, act: nn.Module) -> None:
        super().__init__(num_features, eps, momentum)
        self.drop = drop  # drop and act: what timm's BatchNormAct2d does after the norm
        self.act = act

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"SyncBatchNorm needs (B, C, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with all ranks' statistics when training, with the running ones otherwise."""
        over_ranks = self.training and distributed.world() > 1
        output = self._over_ranks(input) if over_ranks else super().forward(input)
        activated: Tensor = self.act(self.drop(output))
        return activated

    def _over_ranks(self, input: Tensor) -> Tensor:
        output, mean, var, total = _NormaliseOverRanks.apply(input.float(), self.weight, self.bias, self.eps)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(var * total / (total - 1), self.momentum or 0.0)
        return output.to(input.dtype)  # type: ignore[no-any-return]

    @classmethod
    def convert(cls, module: nn.Module) -> nn.Module:
        """The module with every BatchNorm replaced by one of these, sharing its parameters and buffers."""
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not isinstance(module, cls):
            return cls._like(module)
        for name, child in module.named_children():
            module.add_module(name, cls.convert(child))
        return module

    @classmethod
    def _like(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> "SyncBatchNorm":
        if norm.momentum is None or not norm.affine or not norm.track_running_stats:
            raise ValueError(f"sync_batchnorm needs BatchNorm with weights, statistics and momentum, got {norm}")
        synced = cls(
            norm.num_features,
            eps=norm.eps,
            momentum=norm.momentum,
            drop=getattr(norm, "drop", nn.Identity()),
            act=getattr(norm, "act", nn.Identity()),
        )
        synced.weight, synced.bias = norm.weight, norm.bias
        synced.running_mean, synced.running_var = norm.running_mean, norm.running_var
        synced.num_batches_tracked = norm.num_batches_tracked
        return synced.train(norm.training)
