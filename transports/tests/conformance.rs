//! The in-process fabric passes the suite of all fabrics, spinning and parking; so does the simulated one, on a quiet network and on a bad one.

use std::time::Duration;

use volley_transports::conformance::FabricFactory;
use volley_transports::simulated::{Conditions, Pace, SimulatedNetwork};
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

struct Simulated(Conditions);

impl FabricFactory for Simulated {
    fn build(&self, topology: Topology) -> Vec<Box<dyn Endpoint>> {
        let network = SimulatedNetwork::new(self.0, 1, Pace::Looked).unwrap();
        let ends = network.lanes(topology).unwrap();
        ends.into_iter()
            .map(|end| Box::new(end) as Box<dyn Endpoint>)
            .collect()
    }
}

mod simulated {
    use super::*;
    volley_transports::conformance_tests!(Simulated(Conditions::default()));
}

mod simulated_with_loss_and_jitter {
    use super::*;
    volley_transports::conformance_tests!(Simulated(Conditions {
        latency: Duration::from_millis(50),
        jitter: Duration::from_millis(20),
        bytes_per_s: 1e6,
        loss: 0.05,
        packet_bytes: 64,
        ..Conditions::default()
    }));
}
