//! Data cut into parts that do not overlap, one for each piece of an operation.

use std::marker::PhantomData;

use crate::kernels::MatrixMut;

/// Something that can be cut into parts which different threads may hold at the same time.
///
/// # Safety
/// Parts of different indices do not overlap, or are shared immutably.
pub unsafe trait Parts: Sync {
    /// What a piece gets.
    type Part;
    /// How many parts there are.
    fn count(&self) -> usize;
    /// Part `index`.
    ///
    /// # Safety
    /// `index` is below the count, and each part is asked for once.
    unsafe fn part(&self, index: usize) -> Self::Part;
}

/// A slice in chunks of one size, the last one perhaps shorter.
#[derive(Debug)]
pub struct Chunks<'a, T> {
    first: *mut T,
    len: usize,
    size: usize,
    data: PhantomData<&'a mut [T]>,
}

impl<'a, T> Chunks<'a, T> {
    /// Cuts `data` after every `size` elements.
    ///
    /// # Panics
    /// When `size` is 0.
    pub fn new(data: &'a mut [T], size: usize) -> Self {
        assert!(size > 0, "chunks have elements");
        Chunks {
            first: data.as_mut_ptr(),
            len: data.len(),
            size,
            data: PhantomData,
        }
    }
}

// SAFETY: threads get disjoint parts of an exclusive borrow.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

// SAFETY: chunk `i` begins where chunk `i - 1` ends.
unsafe impl<'a, T: Send> Parts for Chunks<'a, T> {
    type Part = &'a mut [T];

    fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    unsafe fn part(&self, index: usize) -> &'a mut [T] {
        let first = index * self.size;
        // SAFETY: within the borrow, and asked for once.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.add(first), self.size.min(self.len - first))
        }
    }
}

/// A matrix cut into groups of rows at given places, and each group into chunks of columns. Parts are numbered group by group.
#[derive(Debug)]
pub struct Grid<'a, 'b> {
    matrix: MatrixMut<'a>,
    bounds: &'b [usize],
    step: usize,
}

impl<'a, 'b> Grid<'a, 'b> {
    /// Group `g` is rows `bounds[g]..bounds[g + 1]`, cut after every `step` columns.
    ///
    /// # Panics
    /// When the bounds fall or end beyond the matrix, or `step` is 0.
    pub fn new(matrix: MatrixMut<'a>, bounds: &'b [usize], step: usize) -> Self {
        let last = bounds.last().copied().unwrap_or(0);
        assert!(
            bounds.is_sorted() && last <= matrix.rows() && step > 0,
            "bounds lie in the matrix"
        );
        Grid {
            matrix,
            bounds,
            step,
        }
    }

    /// Chunks of columns of each group.
    pub fn across(&self) -> usize {
        self.matrix.cols().div_ceil(self.step)
    }
}

// SAFETY: threads get disjoint parts of an exclusive borrow.
unsafe impl Sync for Grid<'_, '_> {}

// SAFETY: the bounds rise, so groups are disjoint, and so are chunks of columns.
unsafe impl<'a> Parts for Grid<'a, '_> {
    type Part = MatrixMut<'a>;

    fn count(&self) -> usize {
        self.bounds.len().saturating_sub(1) * self.across()
    }

    unsafe fn part(&self, index: usize) -> MatrixMut<'a> {
        let (group, chunk) = (index / self.across(), index % self.across());
        let first = chunk * self.step;
        let columns = first..self.matrix.cols().min(first + self.step);
        // SAFETY: within the matrix, and asked for once.
        unsafe {
            self.matrix
                .part(self.bounds[group]..self.bounds[group + 1], columns)
        }
    }
}

// SAFETY: nothing is cut.
unsafe impl Parts for usize {
    type Part = ();

    fn count(&self) -> usize {
        *self
    }

    unsafe fn part(&self, _: usize) {}
}

// SAFETY: each of the two is cut into its own parts.
unsafe impl<A: Parts, B: Parts> Parts for (A, B) {
    type Part = (A::Part, B::Part);

    fn count(&self) -> usize {
        assert_eq!(self.0.count(), self.1.count(), "cut alike");
        self.0.count()
    }

    unsafe fn part(&self, index: usize) -> Self::Part {
        // SAFETY: the caller's promise.
        unsafe { (self.0.part(index), self.1.part(index)) }
    }
}
