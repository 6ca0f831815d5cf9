#!/bin/sh
# Runs a compiler without optimisation: for builds of which only the parts are looked at.
exec "$@" -O0
