"""The parts of AutoLRS, usable alone: batched tensor functions that never wait for the device."""

from lrs_ext.autolrs.acquisition import expected_improvement, lower_confidence_bound
from lrs_ext.autolrs.forecast import forecast
from lrs_ext.autolrs.surrogate import gp_posterior

__all__ = ["expected_improvement", "forecast", "gp_posterior", "lower_confidence_bound"]
