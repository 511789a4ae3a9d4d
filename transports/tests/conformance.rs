//! The in-process fabric passes the suite of all fabrics: spinning, parking, and as it chooses itself.

use volley_transports::conformance::FabricFactory;
use volley_transports::{Endpoint, InProcessFabric, Spin, Topology};

struct InProcess(Spin);

impl FabricFactory for InProcess {
    fn build(&self, topology: Topology) -> Vec<Box<dyn Endpoint>> {
        let ends = InProcessFabric::build_with(topology, self.0).unwrap();
        ends.into_iter()
            .map(|end| Box::new(end) as Box<dyn Endpoint>)
            .collect()
    }
}

mod parking {
    use super::*;
    volley_transports::conformance_tests!(InProcess(Spin::NONE));
}

mod spinning {
    use super::*;
    volley_transports::conformance_tests!(InProcess(Spin(500)));
}
