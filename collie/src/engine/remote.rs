//! The end of another host, spoken to through its agent.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use super::message::{Answer, Facts, HalfOffer, Question, Reading, Task, Timing, VERSION};
use super::{End, EngineError, message};

/// How long an agent may take to answer, beyond what the question itself takes.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct RemoteEnd {
    address: String,
    stream: TcpStream,
    facts: Facts,
    /// The wall-clock limit of the workload that is set up.
    limit: Duration,
}

impl RemoteEnd {
    /// Calls an agent and has it open a port.
    ///
    /// # Errors
    /// It cannot be reached, speaks another version, or cannot open the port.
    pub(super) fn call(address: &str, device: &str, port: u8) -> Result<Self, EngineError> {
        let failed = |what: String| EngineError::Agent {
            address: address.to_owned(),
            what,
        };
        let places = address.to_socket_addrs();
        let places = places.map_err(|error| failed(format!("not an address: {error}")))?;
        let stream = connect(places).map_err(|error| {
            failed(format!(
                "{error}; is `volley vet agent --listen {address}` running there?"
            ))
        })?;
        let mut end = RemoteEnd {
            address: address.to_owned(),
            stream,
            facts: Facts {
                device: device.to_owned(),
                queue_pairs: 0,
                queue_depth: 0,
                sges: 0,
                regions: 0,
                mtu: 0,
                nodes: Vec::new(),
                counters: Vec::new(),
            },
            limit: Duration::ZERO,
        };
        let open = Question::Open {
            version: VERSION,
            device: device.to_owned(),
            port,
        };
        match end.ask(&open, PATIENCE)? {
            Answer::Facts(facts) => end.facts = facts,
            _ => return Err(EngineError::OutOfTurn),
        }
        Ok(end)
    }

    fn ask(&mut self, question: &Question, patience: Duration) -> Result<Answer, EngineError> {
        let answer = (|| {
            self.stream.set_read_timeout(Some(patience))?;
            self.stream.set_write_timeout(Some(PATIENCE))?;
            message::write(&mut self.stream, question)?;
            message::read(&mut self.stream)
        })();
        let what = match answer {
            Ok(Some(Answer::Refused(why))) => why,
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => "it hung up".to_owned(),
            Err(error) if is_late(&error) => format!("no answer within {patience:?}"),
            Err(error) => error.to_string(),
        };
        Err(EngineError::Agent {
            address: self.address.clone(),
            what,
        })
    }
}

impl End for RemoteEnd {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn prepare(&mut self, task: &Task) -> Result<Vec<HalfOffer>, EngineError> {
        self.limit = Duration::from_millis(task.limit_ms);
        let patience = self.limit + PATIENCE;
        match self.ask(&Question::Prepare(task.clone()), patience)? {
            Answer::Offers(offers) => Ok(offers),
            _ => Err(EngineError::OutOfTurn),
        }
    }

    fn connect(&mut self, peers: &[HalfOffer]) -> Result<(), EngineError> {
        let patience = self.limit + PATIENCE;
        match self.ask(&Question::Connect(peers.to_vec()), patience)? {
            Answer::Done => Ok(()),
            _ => Err(EngineError::OutOfTurn),
        }
    }

    fn run(&mut self, timing: Timing) -> Result<Vec<Reading>, EngineError> {
        let patience = Duration::from_millis(timing.total_ms()) + PATIENCE;
        match self.ask(&Question::Run(timing), patience)? {
            Answer::Readings(readings) => Ok(readings),
            _ => Err(EngineError::OutOfTurn),
        }
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        let patience = self.limit + PATIENCE;
        match self.ask(&Question::Finish, patience)? {
            Answer::Done => Ok(()),
            _ => Err(EngineError::OutOfTurn),
        }
    }
}

/// The first of an address's places that answers.
fn connect(places: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for place in places {
        match TcpStream::connect_timeout(&place, PATIENCE) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether a read ended because of its time-out.
pub(super) fn is_late(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
