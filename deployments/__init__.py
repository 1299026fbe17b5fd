"""What runs Gantry: service definitions, set-up, the demo, and the lab of real hosts on one machine."""
