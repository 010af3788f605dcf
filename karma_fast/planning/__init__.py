"""Memory of a training run from its configuration: real code on tensors without values, no weights and no GPU."""

from .gpu import capability_of
from .plan import MemoryPlan, Planner, Unpredicted, plan_memory
from .propose import propose

__all__ = ["MemoryPlan", "Planner", "Unpredicted", "capability_of", "plan_memory", "propose"]
