// node relying_party.js IDENTIFIER RETURN_TO REALM stateless|association times
// Logs in with the library `openid`, and prints what it believes as one line of JSON for each login.
'use strict';
const http = require('http');
const openid = require('openid');

const [identifier, returnTo, realm, mode, times] = process.argv.slice(2);
const party = new openid.RelyingParty(returnTo, realm, mode === 'stateless', true, []);

// The library's timers keep the process alive, so it is ended by hand.
function end(code) {
  process.exitCode = code;
  process.stdout.write('', () => process.exit(code));
}

function login() {
  return new Promise((resolve, reject) => {
    party.authenticate(identifier, false, (problem, url) => {
      if (problem || !url) {
        reject(new Error(problem ? problem.message : 'no URL'));
        return;
      }
      http.get(url, (response) => {
        response.resume();
        party.verifyAssertion(response.headers.location, (refusal, result) => {
          if (refusal) {
            reject(new Error(refusal.message));
          } else {
            resolve({ authenticated: result.authenticated, claimedIdentifier: result.claimedIdentifier, url: response.headers.location });
          }
        });
      }).on('error', reject);
    });
  });
}

(async () => {
  for (let i = 0; i < Number(times); i += 1) {
    console.log(JSON.stringify(await login()));
  }
  end(0);
})().catch((error) => {
  console.error(error.message);
  end(1);
});
