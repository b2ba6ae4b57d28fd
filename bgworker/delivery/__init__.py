"""From what a task says to what a sink is told: intake -> dispatcher -> courier -> sink. Knows no
concrete sink."""
