"""How bytes travel: one interface (base), MQTT through paho (mqtt), and a broker in memory with faults (memory)."""
