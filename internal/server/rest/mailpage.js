// Sends the token in the fragment of a mailed link, and the password if the page asks for
// one.
const form = document.forms[0]
const button = form.querySelector('button')
const alert = form.querySelector('[role=alert]')

form.addEventListener('submit', async event => {
	event.preventDefault()
	const token = new URLSearchParams(location.hash.slice(1)).get('token')
	const password = form.elements.password?.value
	if (!token) {
		alert.textContent = 'The link is incomplete. Open the full link from the mail.'
		return
	}
	if (form.elements.again && form.elements.again.value !== password) {
		alert.textContent = 'The two passwords are not the same.'
		return
	}
	alert.textContent = ''
	button.disabled = true
	try {
		const answer = await fetch(form.action, {
			method: 'POST',
			headers: {'Content-Type': 'application/json'},
			body: JSON.stringify({token, password}),
		})
		if (answer.ok) {
			// Remove the used token from the history.
			history.replaceState(null, '', location.pathname)
			form.hidden = true
			document.getElementById('done').hidden = false
			return
		}
		alert.textContent = (await answer.json()).error.message
	} catch {
		alert.textContent = 'The service does not respond. Try again.'
	}
	button.disabled = false
})
