"""Load tests of the real programs: many real MQTT clients against a real broker, measured from /proc."""
