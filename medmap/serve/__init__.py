"""The local page: drop in a patient's images, switch sequences on and off, take the mask away. Nothing leaves the
machine; files live in one folder that is removed in the end."""
