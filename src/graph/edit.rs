//! Applies an edit to one row of values.

use super::steering::{Change, Edit, Operation, When};

/// An [`Edit`] with everything precomputed that does not depend on the row.
#[derive(Debug, Clone)]
pub(super) struct PreparedEdit {
    pub(super) when: When,
    coefficient: f32,
    change: PreparedChange,
}

#[derive(Debug, Clone)]
enum PreparedChange {
    Neuron { index: usize, operation: Operation },
    Add { vector: Vec<f32> },
    Component { unit: Vec<f32>, operation: Operation },
}

impl PreparedEdit {
    pub(super) fn of(edit: &Edit) -> PreparedEdit {
        let change = match &edit.change {
            &Change::Neuron { index, operation } => PreparedChange::Neuron { index, operation },
            Change::Direction { vector, operation: Operation::Offset(offset) } => {
                PreparedChange::Add { vector: vector.iter().map(|v| v * offset).collect() }
            }
            Change::Direction { vector, operation } => {
                let norm = vector.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                let unit = vector.iter().map(|&v| (f64::from(v) / norm) as f32).collect();
                PreparedChange::Component { unit, operation: *operation }
            }
        };
        PreparedEdit { when: edit.when, coefficient: edit.coefficient, change }
    }

    /// Edits one row, with the edit's coefficient multiplied by `factor`.
    ///
    /// `None` if the row does not have the width that the edit needs.
    pub(super) fn apply(&self, row: &mut [f32], factor: f32) -> Option<()> {
        let coefficient = self.coefficient * factor;
        match &self.change {
            PreparedChange::Neuron { index, operation } => {
                let a = row.get_mut(*index)?;
                *a = changed(*a, *operation, coefficient);
            }
            PreparedChange::Add { vector } if vector.len() == row.len() => {
                for (x, v) in row.iter_mut().zip(vector) {
                    *x += coefficient * v;
                }
            }
            PreparedChange::Component { unit, operation } if unit.len() == row.len() => {
                let component: f64 = row.iter().zip(unit).map(|(&x, &u)| f64::from(x) * f64::from(u)).sum();
                let component = component as f32;
                let difference = changed(component, *operation, coefficient) - component;
                for (x, u) in row.iter_mut().zip(unit) {
                    *x += difference * u;
                }
            }
            PreparedChange::Add { .. } | PreparedChange::Component { .. } => return None,
        }
        Some(())
    }
}

/// `a + coefficient * (operation(a) - a)`; exactly `operation(a)` if the coefficient is 1.
fn changed(a: f32, operation: Operation, coefficient: f32) -> f32 {
    match operation {
        Operation::Offset(offset) => a + coefficient * offset,
        _ if coefficient == 1.0 => operation.apply(a),
        _ => a + coefficient * (operation.apply(a) - a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edit(coefficient: f32, change: PreparedChange) -> PreparedEdit {
        PreparedEdit { when: When::Both, coefficient, change }
    }

    #[test]
    fn the_coefficient_scales_the_change_of_a_neuron() {
        for (operation, coefficient, expected) in [
            (Operation::Offset(-3.0), 0.5, 0.5),
            (Operation::Assign(6.0), 1.0, 6.0),
            (Operation::Assign(6.0), 0.25, 3.0),
            (Operation::Scale(0.0), 1.0, 0.0),
            (Operation::Scale(3.0), 0.5, 4.0),
            (Operation::Clamp { min: -1.0, max: 1.0 }, 1.0, 1.0),
            (Operation::Clamp { min: -1.0, max: 1.0 }, 2.0, 0.0),
        ] {
            let mut row = [9.0, 2.0];
            edit(coefficient, PreparedChange::Neuron { index: 1, operation }).apply(&mut row, 1.0).unwrap();
            assert_eq!(row, [9.0, expected], "{operation:?} by {coefficient}");
        }
    }

    #[test]
    fn a_component_is_changed_only_along_its_direction() {
        // The row (5, 0) has the component 3 along (0.6, 0.8). Without it, (3.2, -2.4) is left.
        let unit = vec![0.6, 0.8];
        let mut row = [5.0, 0.0];
        let assign = PreparedChange::Component { unit: unit.clone(), operation: Operation::Assign(0.0) };
        edit(1.0, assign).apply(&mut row, 1.0).unwrap();
        assert!((row[0] - 3.2).abs() < 1e-6 && (row[1] + 2.4).abs() < 1e-6, "{row:?}");
        let mut row = [5.0, 0.0];
        let clamp =
            PreparedChange::Component { unit, operation: Operation::Clamp { min: f32::MIN, max: 1.0 } };
        edit(1.0, clamp).apply(&mut row, 1.0).unwrap();
        assert!((row[0] - 3.8).abs() < 1e-6 && (row[1] + 1.6).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn rejects_an_edit_that_does_not_fit_the_row() {
        let mut row = [0.0; 2];
        let neuron = PreparedChange::Neuron { index: 2, operation: Operation::Assign(1.0) };
        assert!(edit(1.0, neuron).apply(&mut row, 1.0).is_none());
        assert!(edit(1.0, PreparedChange::Add { vector: vec![1.0; 3] }).apply(&mut row, 1.0).is_none());
    }
}
