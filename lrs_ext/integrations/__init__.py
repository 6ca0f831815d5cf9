"""What training frameworks need to be told: one module a framework, imported only when used."""

from lrs_ext.integrations.own_schedule import OwnSchedule

__all__ = ["OwnSchedule"]
