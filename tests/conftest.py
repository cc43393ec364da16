"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A shared machine may be slow for a moment; how long an example takes is not what properties are about.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", parent=settings.get_profile("default"), max_examples=5000)
settings.load_profile("default")
