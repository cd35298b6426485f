"""Benchmarks behind `jaxinfer bench`: each speaks in hardware terms and writes JSON."""
