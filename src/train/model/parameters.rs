//! The trained tensors and their gradients.

use crate::error::Result;
use crate::steer::{control_vector, lora};

use crate::train::device::Device;

/// Index of a parameter, in the order they were added.
pub type ParameterId = usize;

/// What a parameter is to the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// The factor A of a low-rank change.
    LoraA {
        /// The changed tensor, such as `blk.0.attn_q.weight`.
        tensor: String,
    },
    /// The factor B of a low-rank change.
    LoraB {
        /// The changed tensor.
        tensor: String,
    },
    /// A vector added to the residual stream after a block.
    Direction {
        /// The block, counted from 0.
        layer: usize,
    },
    /// A tensor of the model itself.
    Tensor {
        /// Its name.
        name: String,
    },
}

impl Role {
    /// The parameter's tensor name in checkpoints, adapters, control vectors and models.
    pub fn tensor_name(&self) -> String {
        match self {
            Role::LoraA { tensor } => lora::a_name(tensor),
            Role::LoraB { tensor } => lora::b_name(tensor),
            Role::Direction { layer } => control_vector::tensor_name(*layer),
            Role::Tensor { name } => name.clone(),
        }
    }
}

/// One trained tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// What it is to the model.
    pub role: Role,
    /// [`Role::tensor_name`], such as `blk.0.attn_q.weight.lora_a`.
    pub name: String,
    /// Slowest axis first.
    pub shape: Vec<usize>,
}

/// All trained tensors.
#[derive(Debug)]
pub struct Parameters<D: Device> {
    list: Vec<Parameter>,
    /// Values, in the order of [`Parameters::list`].
    pub values: Vec<D::Buffer>,
    /// Gradients of the loss, in the same order and shapes.
    pub gradients: Vec<D::Buffer>,
}

impl<D: Device> Default for Parameters<D> {
    fn default() -> Self {
        Parameters { list: Vec::new(), values: Vec::new(), gradients: Vec::new() }
    }
}

impl<D: Device> Parameters<D> {
    /// Adds a tensor with its initial values and a gradient of zeros.
    ///
    /// # Errors
    /// Those of the device, such as out of memory.
    pub fn add(&mut self, device: &D, role: Role, shape: Vec<usize>, values: &[f32]) -> Result<ParameterId> {
        let name = role.tensor_name();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "the values of {name} must fill its shape");
        self.values.push(device.upload(values)?);
        self.gradients.push(device.zeros(values.len())?);
        self.list.push(Parameter { role, name, shape });
        Ok(self.list.len() - 1)
    }

    /// Roles, names and shapes.
    pub fn list(&self) -> &[Parameter] {
        &self.list
    }

    /// The number of trained values.
    pub fn n_values(&self) -> usize {
        self.list.iter().map(|p| p.shape.iter().product::<usize>()).sum()
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// Those of the device.
    pub fn clear_gradients(&mut self, device: &D) -> Result<()> {
        self.gradients.iter_mut().try_for_each(|gradient| device.clear(gradient))
    }

    /// The Euclidean norm of all gradients together.
    ///
    /// # Errors
    /// Those of the device.
    pub fn gradient_norm(&self, device: &D) -> Result<f64> {
        Ok(device.square_sum_all(&self.gradients)?.sqrt())
    }
}
