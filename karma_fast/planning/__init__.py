"""Memory of a training run from its configuration: real code on tensors without values, no weights and no GPU."""

from .plan import MemoryPlan, Planner, plan_memory
from .propose import propose

__all__ = ["MemoryPlan", "Planner", "plan_memory", "propose"]
