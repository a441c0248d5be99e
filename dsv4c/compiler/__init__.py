"""From a config to a plan: jobs and their stages, compile, verify, bisect."""
