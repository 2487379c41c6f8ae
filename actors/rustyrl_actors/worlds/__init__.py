"""The worlds that come with the framework."""
