"""The machine under the runtime: what it can tell of memory and temperature."""
