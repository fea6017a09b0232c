"""Local stand-ins that speak the providers' real HTTP: no keys, no cloud, a small real model, a bill, a menu of faults."""
