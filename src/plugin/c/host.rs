//! The host program's table of ggml functions, and a tensor of the host as a [`Node`].

use std::ffi::{CStr, c_char, c_void};

use super::argument::{SizedStruct, read_struct};
use super::status::Failure;
use crate::graph::rows::MOST_TOKENS;
use crate::graph::{Node, Shape};

/// `struct ggml_tensor`, opaque.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Tensor {
    _unknown: [u8; 0],
}

/// `detox_shape`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct RawShape {
    pub(super) tensor_type: i32,
    pub(super) ne: [i64; 4],
    pub(super) nb: [usize; 4],
}

type NameFn = unsafe extern "C" fn(*const Tensor) -> *const c_char;
type ShapeFn = unsafe extern "C" fn(*const Tensor, *mut RawShape);
type GetFn = unsafe extern "C" fn(*const Tensor, *mut c_void, usize, usize);
type SetFn = unsafe extern "C" fn(*mut Tensor, *const c_void, usize, usize);
type SourceFn = unsafe extern "C" fn(*const Tensor, i32) -> *const Tensor;

/// `detox_host_table`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RawTable {
    pub(super) size: usize,
    pub(super) name: Option<NameFn>,
    pub(super) shape: Option<ShapeFn>,
    pub(super) get: Option<GetFn>,
    pub(super) set: Option<SetFn>,
    pub(super) op: Option<NameFn>,
    pub(super) source: Option<SourceFn>,
}

// SAFETY: `repr(C)`, the size first; a null function pointer is `None`.
unsafe impl SizedStruct for RawTable {
    const LEAST: usize = std::mem::offset_of!(RawTable, op);
    const ENDS: &'static [usize] = &[std::mem::offset_of!(RawTable, source), size_of::<RawTable>()];
}

/// A checked [`RawTable`]: the required functions are present.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostTable {
    name: NameFn,
    shape: ShapeFn,
    get: GetFn,
    set: SetFn,
    op: Option<NameFn>,
    source: Option<SourceFn>,
}

impl HostTable {
    /// Reads and checks a table.
    ///
    /// # Safety
    /// - `table` is null, or a `detox_host_table` that is as long as its size says.
    /// - Its functions do what the header says, for as long as the table is used.
    pub(super) unsafe fn read(table: *const RawTable) -> Result<HostTable, Failure> {
        // SAFETY: as this function's own contract.
        let raw = unsafe { read_struct("table", table)? };
        let missing =
            |name: &str| Failure::argument(format!("table: expected the function {name:?}, found NULL"));
        Ok(HostTable {
            name: raw.name.ok_or_else(|| missing("name"))?,
            shape: raw.shape.ok_or_else(|| missing("shape"))?,
            get: raw.get.ok_or_else(|| missing("get"))?,
            set: raw.set.ok_or_else(|| missing("set"))?,
            op: raw.op,
            source: raw.source,
        })
    }

    /// Whether the table has the optional functions, which tell the sequences of a micro-batch apart.
    pub(super) fn knows_sources(&self) -> bool {
        self.op.is_some() && self.source.is_some()
    }

    fn shape_of(&self, tensor: *const Tensor) -> RawShape {
        let mut shape = RawShape::default();
        // SAFETY: the table's function, by the contract of `read`, on a tensor of the running graph.
        unsafe { (self.shape)(tensor, &raw mut shape) };
        shape
    }
}

/// `GGML_TYPE_F32` and `GGML_TYPE_I64`. Type numbers are part of the GGUF format and never change.
const F32: i32 = 0;
const I64: i32 = 27;

/// A tensor of the host, valid only during the callback.
pub(super) struct HostNode<'a> {
    table: &'a HostTable,
    tensor: *mut Tensor,
    name: &'a [u8],
}

impl<'a> HostNode<'a> {
    /// # Safety
    /// `tensor` is one that llama.cpp passed to the eval callback, which has not returned yet.
    pub(super) unsafe fn new(table: &'a HostTable, tensor: *mut Tensor) -> HostNode<'a> {
        // SAFETY: the table's function, by the contract of `HostTable::read`, on a live tensor.
        let name = unsafe { (table.name)(tensor) };
        let name: &[u8] = match name.is_null() {
            true => b"",
            // SAFETY: a NUL-terminated string in the tensor, which lives during the callback.
            false => unsafe { CStr::from_ptr(name) }.to_bytes(),
        };
        HostNode { table, tensor, name }
    }
}

impl Node for HostNode<'_> {
    fn name(&self) -> &[u8] {
        self.name
    }

    fn shape(&self) -> Shape {
        let RawShape { tensor_type, ne, nb } = self.table.shape_of(self.tensor);
        Shape { is_f32: tensor_type == F32, ne, nb }
    }

    fn get(&self, values: &mut [f32]) -> Result<(), String> {
        // SAFETY: the table's function, by the contract of `HostTable::read`, on a live tensor. The caller has sized
        // `values` by the tensor's shape, so both have the requested bytes.
        unsafe { (self.table.get)(self.tensor, values.as_mut_ptr().cast(), 0, size_of_val(values)) };
        Ok(())
    }

    fn set(&mut self, values: &[f32]) -> Result<(), String> {
        // SAFETY: as in `get`.
        unsafe { (self.table.set)(self.tensor, values.as_ptr().cast(), 0, size_of_val(values)) };
        Ok(())
    }

    fn writes_rows(&self) -> bool {
        let Some(op) = self.table.op else { return false };
        // SAFETY: the table's function, by the contract of `HostTable::read`, on a live tensor.
        let op = unsafe { op(self.tensor) };
        // SAFETY: not null, so a NUL-terminated string that ggml owns.
        !op.is_null() && unsafe { CStr::from_ptr(op) } == c"SET_ROWS"
    }

    fn row_targets(&self) -> Option<(Vec<i64>, usize)> {
        let source = self.table.source?;
        // Sources of SET_ROWS: 0 the values, 1 the row indices, 2 the tensor written to.
        // SAFETY: the table's function, by the contract of `HostTable::read`, on a live tensor.
        let (indices, target) = unsafe { (source(self.tensor, 1), source(self.tensor, 2)) };
        if indices.is_null() || target.is_null() {
            return None;
        }
        let shape = self.table.shape_of(indices);
        let extent = Shape { is_f32: false, ne: shape.ne, nb: shape.nb };
        let n = extent.n_values();
        if shape.tensor_type != I64 || shape.nb[0] != size_of::<i64>() || n > MOST_TOKENS {
            return None;
        }
        let mut values = vec![0i64; n];
        // SAFETY: as in `get`; `values` has room for all values of the tensor, 8 bytes each.
        unsafe { (self.table.get)(indices, values.as_mut_ptr().cast(), 0, n * size_of::<i64>()) };
        Some((values, usize::try_from(self.table.shape_of(target).ne[1]).ok()?))
    }
}
