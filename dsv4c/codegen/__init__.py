"""Graph and plan to cubins: emission, build, registry."""
