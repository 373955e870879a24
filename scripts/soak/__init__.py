"""A soak test of the program: kills at random moments, and mutated inputs. scripts/soak.sh runs it."""
