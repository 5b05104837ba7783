"""Whether a release of a system still has what an integration touches: `dynaflow doctor --release`."""
