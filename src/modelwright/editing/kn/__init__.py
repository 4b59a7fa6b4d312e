"""Knowledge neurons: find the units that hold a fact, and rewrite what they write."""
