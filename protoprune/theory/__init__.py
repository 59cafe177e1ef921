"""The papers' theory of pruning: a teacher-student perceptron, solved, simulated, and put into advice."""
