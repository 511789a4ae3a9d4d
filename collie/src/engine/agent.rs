//! The agent: serves the ports of its host to coordinators elsewhere, one at a time.
//!
//! A coordinator's connection is its session. When the connection ends, for whatever reason, or its questions do not come within the time that they may take, all that was
//! set up for it is taken down. What a coordinator asks is checked against what the host can do.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::end::LocalEnd;
use super::message::{Answer, Question, VERSION};
use super::remote::{PATIENCE, is_late};
use super::{End, EngineError, message};

/// A workload's wall-clock limit that a coordinator may ask for, at most.
const LIMIT_MAX_MS: u64 = 600_000;

/// How an agent is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentOptions {
    /// Where it listens: a management address, apart from the traffic's.
    pub listen: SocketAddr,
    /// How long a coordinator may rest between two workloads.
    pub rest: Duration,
}

/// An agent that listens.
pub struct Agent {
    listener: TcpListener,
    rest: Duration,
}

impl Agent {
    /// An agent at an address.
    ///
    /// # Errors
    /// The address cannot be had.
    pub fn bind(options: &AgentOptions) -> io::Result<Self> {
        Ok(Agent {
            listener: TcpListener::bind(options.listen)?,
            rest: options.rest,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for one coordinator and serves it until it is gone. `note` is told who came, and how each ended.
    ///
    /// # Errors
    /// The listener broke. A coordinator's faults are none of this.
    pub fn serve_one(&self, note: &mut dyn FnMut(String)) -> io::Result<()> {
        let (stream, from) = self.listener.accept()?;
        note(format!("{from} coordinates"));
        match serve(stream, self.rest) {
            Ok(workloads) => note(format!("{from} is gone after {workloads} workloads")),
            Err(error) if is_late(&error) => note(format!("{from} was silent for too long")),
            Err(error) => note(format!("{from} is gone: {error}")),
        }
        Ok(())
    }
}

/// Answers questions until the connection ends; how many workloads were set up. The end is taken down with it.
fn serve(mut stream: TcpStream, rest: Duration) -> io::Result<usize> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (mut end, mut workloads): (Option<LocalEnd>, usize) = (None, 0);
    // Between workloads a coordinator may think; before it has said who it is and within one it may not.
    let mut patience = PATIENCE;
    loop {
        stream.set_read_timeout(Some(patience))?;
        let Some(question) = message::read::<Question>(&mut stream)? else {
            return Ok(workloads);
        };
        patience = match &question {
            Question::Open { .. } | Question::Finish => rest,
            Question::Prepare(task) => {
                workloads += 1;
                Duration::from_millis(task.limit_ms.min(LIMIT_MAX_MS)) + PATIENCE
            }
            Question::Connect(_) | Question::Run(_) => patience,
        };
        let answer = answer(&mut end, question);
        message::write(
            &mut stream,
            &answer.unwrap_or_else(|error| Answer::Refused(error.to_string())),
        )?;
    }
}

fn answer(end: &mut Option<LocalEnd>, question: Question) -> Result<Answer, EngineError> {
    if let Question::Open {
        version,
        device,
        port,
    } = question
    {
        if version != VERSION {
            return Err(EngineError::Unfit(format!(
                "protocol version {version}; this agent speaks {VERSION}: run the same volley on both hosts"
            )));
        }
        *end = None;
        let opened = end.insert(LocalEnd::open(&device, port)?);
        return Ok(Answer::Facts(opened.facts().clone()));
    }
    let end = end.as_mut().ok_or(EngineError::OutOfTurn)?;
    Ok(match question {
        Question::Open { .. } => unreachable!("answered above"),
        Question::Prepare(mut task) => {
            task.limit_ms = task.limit_ms.min(LIMIT_MAX_MS);
            Answer::Offers(end.prepare(&task)?)
        }
        Question::Connect(peers) => {
            end.connect(&peers)?;
            Answer::Done
        }
        Question::Run(timing) => Answer::Readings(end.run(timing)?),
        Question::Finish => {
            end.finish()?;
            Answer::Done
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::remote::RemoteEnd;
    use super::*;

    /// An agent that serves so many coordinators, and where it is.
    fn agent(coordinators: usize) -> (String, std::thread::JoinHandle<Vec<String>>) {
        let options = AgentOptions {
            listen: "127.0.0.1:0".parse().unwrap(),
            rest: Duration::from_secs(5),
        };
        let agent = Agent::bind(&options).unwrap();
        let address = agent.address().unwrap().to_string();
        let thread = std::thread::spawn(move || {
            let mut notes = Vec::new();
            for _ in 0..coordinators {
                agent.serve_one(&mut |note| notes.push(note)).unwrap();
            }
            notes
        });
        (address, thread)
    }

    #[test]
    fn strangers_are_hung_up_on_and_wrong_questions_refused_by_name() {
        let (address, thread) = agent(4);
        // Not a frame of ours.
        let mut stranger = TcpStream::connect(&address).unwrap();
        io::Write::write_all(&mut stranger, b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stranger.set_read_timeout(Some(PATIENCE)).unwrap();
        let answer = message::read::<Answer>(&mut stranger);
        assert!(matches!(answer, Ok(None) | Err(_)), "{answer:?}");
        // Another version.
        let ask = |question: &Question| {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            message::write(&mut stream, question).unwrap();
            message::read::<Answer>(&mut stream).unwrap().unwrap()
        };
        let open = Question::Open {
            version: VERSION + 1,
            device: "none".into(),
            port: 1,
        };
        let Answer::Refused(why) = ask(&open) else {
            panic!("another version is refused")
        };
        assert!(why.contains("version 2"), "{why}");
        // Out of turn.
        assert!(matches!(ask(&Question::Finish), Answer::Refused(_)));
        // A device that is not there: the coordinator hears why, and where.
        let error = RemoteEnd::call(&address, "no_such_device", 1);
        let error = error.err().expect("there is no such device").to_string();
        assert!(error.starts_with(&format!("agent {address}")), "{error}");
        let notes = thread.join().unwrap();
        assert_eq!(notes.len(), 8);
        assert!(notes[1].contains("is this a vet agent"), "{}", notes[1]);
    }

    #[test]
    fn an_agent_that_is_not_there_is_named_with_the_command_that_starts_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        let error = RemoteEnd::call(&address, "mlx5_0", 1);
        let error = error.err().expect("nobody listens").to_string();
        assert!(error.contains("volley vet agent --listen"), "{error}");
    }
}
