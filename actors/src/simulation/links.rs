//! Links between workers and the controller: how they are made, what they carry, how they break.
//!
//! A link keeps the order of its messages in each direction. While the two do not reach each other, messages are stuck; after
//! a silence the controller takes the worker for gone, and the worker calls again.

use std::time::Duration;

use rand::RngExt;
use volley_transports::WorkerId;

use super::host::{ControlLink, Down, Up};
use super::{DRAIN, Happening, REDIAL, REDIAL_MAX, Simulation};
use crate::voice::WorkerWord;

impl Simulation {
    /// The link to an occupant.
    pub(super) fn link(&mut self, worker: WorkerId, life: u64) -> Option<&mut ControlLink> {
        let link = self.hosts.get_mut(&worker)?.link.as_mut()?;
        (link.life == life).then_some(link)
    }

    /// A process says something. Without a link nobody hears it, but what it holds is said again in the next call.
    pub(super) fn say(&mut self, worker: WorkerId, up: Up) {
        let sent = self.now() + self.control_delay();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        if let (Some(process), Up::Word(WorkerWord::Loaded(holds))) = (&mut host.process, &up) {
            process.holds = Some(holds.clone());
        }
        let Some(link) = &mut host.link else { return };
        link.up_until = link.up_until.max(sent);
        let (at, life) = (link.up_until, link.life);
        self.push(at, Happening::Up(worker, life, up));
    }

    /// The controller says something to an occupant.
    pub(super) fn tell(&mut self, worker: WorkerId, life: u64, down: Down) {
        let sent = self.now() + self.control_delay();
        let Some(link) = self.link(worker, life) else {
            return;
        };
        link.down_until = link.down_until.max(sent);
        let at = link.down_until;
        self.push(at, Happening::Down(worker, life, down));
    }

    /// A message arrives at a worker.
    pub(super) fn arrives(&mut self, worker: WorkerId, life: u64, down: Down) {
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        let (Some(link), Some(process)) = (&mut host.link, &mut host.process) else {
            return;
        };
        if link.life != life {
            return;
        }
        if host.unheard > 0 {
            link.stuck_down.push(down);
        } else if matches!(down, Down::Released) {
            self.end_process(worker);
        } else {
            process.deliver(down);
            self.wake(worker);
        }
    }

    /// A process calls the controller.
    pub(super) fn dial(&mut self, worker: WorkerId, number: u64) {
        let after = self.control_delay();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        if host
            .process
            .as_ref()
            .is_none_or(|process| process.number != number)
        {
            return;
        }
        // One that is stopped calls when it runs again.
        if host.link.is_some() || host.stopped > 0 {
            return;
        }
        if host.unheard > 0 {
            self.redial(worker);
        } else {
            let at = self.now() + after;
            self.push(at, Happening::Hello(worker, number));
        }
    }

    /// A call arrives.
    pub(super) fn hello(&mut self, worker: WorkerId, number: u64) {
        let now = self.now();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        let Some(process) = host
            .process
            .as_mut()
            .filter(|process| process.number == number)
        else {
            return;
        };
        if host.link.is_some() {
            return;
        }
        let loaded = process.holds.clone();
        if host.unheard > 0 {
            self.redial(worker);
            return;
        }
        let Some(life) = self.controller.hello(worker, loaded) else {
            // The seat is still taken by the one that was there before.
            self.redial(worker);
            return;
        };
        process.redial = REDIAL;
        host.link = Some(ControlLink::new(life, now));
        let leaving = process.leaving;
        self.note(format!("{worker} has joined"));
        self.controller.welcomed(now);
        self.do_deeds();
        if leaving {
            self.say(worker, Up::Leaving);
        }
    }

    /// A worker finds its link broken, and calls again.
    pub(super) fn link_broke(&mut self, worker: WorkerId, life: u64) {
        if self.link(worker, life).is_none() {
            return;
        }
        if let Some(host) = self.hosts.get_mut(&worker) {
            host.link = None;
        }
        self.redial(worker);
    }

    /// A process is told to leave.
    pub(super) fn leave(&mut self, worker: WorkerId) {
        let now = self.now();
        let process = self
            .hosts
            .get_mut(&worker)
            .and_then(|host| host.process.as_mut());
        if let Some(process) = process {
            process.leaving = true;
            let number = process.number;
            self.push(now + DRAIN, Happening::Impatient(worker, number));
            self.say(worker, Up::Leaving);
        }
    }

    /// From now on the controller and a worker do not reach each other.
    pub(super) fn unheard(&mut self, worker: WorkerId) {
        let now = self.now();
        let idle = self.mold.config.network.idle_timeout;
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        host.unheard += 1;
        if host.unheard == 1 {
            host.unheard_since = Some(now);
            if let Some(link) = &host.link {
                let life = link.life;
                self.push(now + idle, Happening::Silence(worker, life, now));
            }
        }
    }

    /// They reach each other again; what was stuck arrives.
    pub(super) fn heard_again(&mut self, worker: WorkerId) {
        let now = self.now();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        host.unheard -= 1;
        if host.unheard > 0 {
            return;
        }
        host.unheard_since = None;
        let Some(link) = &mut host.link else { return };
        let life = link.life;
        let (down, up) = (
            std::mem::take(&mut link.stuck_down),
            std::mem::take(&mut link.stuck_up),
        );
        for down in down {
            self.arrives(worker, life, down);
        }
        for up in up {
            self.controller.hear(worker, life, up, now);
            self.do_deeds();
        }
    }

    /// Calls again after a pause that doubles.
    pub(super) fn redial(&mut self, worker: WorkerId) {
        let jitter = self.random.random::<f64>() / 2.0;
        let now = self.now();
        let Some(process) = self
            .hosts
            .get_mut(&worker)
            .and_then(|host| host.process.as_mut())
        else {
            return;
        };
        let pause = process.redial;
        process.redial = (pause * 2).min(REDIAL_MAX);
        let number = process.number;
        self.push(
            now + pause.mul_f64(1.0 + jitter),
            Happening::Dial(worker, number),
        );
    }

    /// Time of a message between the controller and a worker.
    pub(super) fn control_delay(&mut self) -> Duration {
        let network = self.mold.config.network;
        let mut delay = network.latency + network.jitter.mul_f64(self.random.random::<f64>());
        if self.random.random::<f64>() < network.loss {
            delay += network.retransmit;
        }
        delay
    }
}
