//! What is trained: named tensors with their gradients.

use crate::error::Result;

use crate::train::device::Device;

/// Which parameter, in the order they were added.
pub type ParameterId = usize;

/// One trained tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the file that will hold it, such as `blk.0.attn_q.weight.lora_a`.
    pub name: String,
    /// Slowest axis first.
    pub shape: Vec<usize>,
}

/// All trained tensors.
#[derive(Debug)]
pub struct Parameters<D: Device> {
    list: Vec<Parameter>,
    /// Their numbers, in the order of the list.
    pub values: Vec<D::Buffer>,
    /// The loss's gradients, in the order of the list.
    pub gradients: Vec<D::Buffer>,
}

impl<D: Device> Default for Parameters<D> {
    fn default() -> Self {
        Parameters { list: Vec::new(), values: Vec::new(), gradients: Vec::new() }
    }
}

impl<D: Device> Parameters<D> {
    /// Adds a tensor with its first numbers.
    ///
    /// # Errors
    /// Of the device: memory.
    pub fn add(
        &mut self,
        device: &D,
        name: String,
        shape: Vec<usize>,
        values: &[f32],
    ) -> Result<ParameterId> {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "the numbers of {name} for its shape");
        self.values.push(device.upload(values)?);
        self.gradients.push(device.zeros(values.len())?);
        self.list.push(Parameter { name, shape });
        Ok(self.list.len() - 1)
    }

    /// Names and shapes.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// Numbers in all of them.
    pub fn n_values(&self) -> usize {
        self.list.iter().map(|p| p.shape.iter().product::<usize>()).sum()
    }

    /// Forgets the gradients.
    ///
    /// # Errors
    /// Of the device.
    pub fn clear_gradients(&mut self, device: &D) -> Result<()> {
        self.gradients.iter_mut().try_for_each(|gradient| device.clear(gradient))
    }

    /// The Euclidean norm of all gradients together.
    ///
    /// # Errors
    /// Of the device.
    pub fn gradient_norm(&self, device: &D) -> Result<f64> {
        Ok(device.square_sum_all(&self.gradients)?.sqrt())
    }
}
