"""The benchmark of soft prompts, projection and insertion: ``python -m benchmarks.soft_prompt --help``."""
