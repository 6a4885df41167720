//! The device of tests: the fake one, or the GPU that `TIDEMILL_TEST_GPU` asks for by its number, where these tests then are those of
//! the GPU. Asked for where it is not there, they fail.

use std::sync::Arc;

use tidemill_kernels::cuda::Driver;
use tidemill_kernels::cuda::emulator::Order;
use tidemill_kernels::cuda::fake::Fake;
use tidemill_kernels::cuda::gpu::Gpu;
use tidemill_kernels::cuda::images::Images;

/// A device of one test's own.
pub(crate) enum TestGpu {
    Fake(Arc<Fake>),
    Gpu(Arc<Gpu>),
}

impl TestGpu {
    /// The threads of a fake one take turns in this order.
    pub(crate) fn new(order: Order) -> Self {
        let Some(number) = std::env::var_os(ASKED_FOR) else { return Self::Fake(Arc::new(Fake::new(order))) };
        let number = number.to_str().and_then(|it| it.parse().ok()).expect("the number of a GPU");
        let gpu = Gpu::open(number, Images::usual_folder()).expect("a GPU is there that was asked for");
        Self::Gpu(Arc::new(gpu))
    }

    pub(crate) fn driver(&self) -> Arc<dyn Driver> {
        match self {
            Self::Fake(fake) => Arc::clone(fake) as _,
            Self::Gpu(gpu) => Arc::clone(gpu) as _,
        }
    }

    /// Only the fake knows; others use the memory of a GPU too.
    pub(crate) fn assert_nothing_left(&self) {
        if let Self::Fake(fake) = self {
            fake.assert_nothing_left();
        }
    }
}

const ASKED_FOR: &str = "TIDEMILL_TEST_GPU";
