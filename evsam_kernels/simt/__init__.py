"""Runs PTX on the CPU, checks it and counts it; says what machine code takes and cannot beat."""
