// Tests that a guest's pages cannot attack the service that runs the guest. WRENN_PORT_URL
// is one of the guest's ports, WRENN_FILE_URL a signed URL that its hostile daemon serves.
import {expect, test} from '@playwright/test'

const {WRENN_PORT_URL: port, WRENN_FILE_URL: file, WRENN_TRAFFIC: traffic, WRENN_EMAIL: email, WRENN_PASSWORD: password} = process.env

test.use({ignoreHTTPSErrors: true})

// loggedIn returns the e-mail address of the user that the browser's cookies log in, or the
// response's status.
async function loggedIn(context, baseURL) {
	const page = await context.newPage()
	const answer = await page.goto(baseURL + '/v1/me')
	const body = answer.ok() ? (await answer.json()).email : answer.status()
	await page.close()
	return body
}

test.beforeEach(async ({context, baseURL}) => {
	await context.route(port + '/**', route => route.continue({headers: {...route.request().headers(), 'x-traffic-token': traffic}}))
	const page = await context.newPage()
	await page.goto(baseURL + '/verify')
	expect(await page.evaluate(async body => (await fetch('/v1/auth/login', {
		method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body),
	})).status, {email, password})).toBe(200)
	await page.close()
	expect(await loggedIn(context, baseURL)).toBe(email)
})

test("a guest's page cannot read the service's cookies or run scripts under its origin", async ({page, context, baseURL}) => {
	const service = new URL(baseURL)
	const ours = async () => (await context.cookies(baseURL)).filter(c => c.name.includes('wrenn_') && c.domain === service.hostname)
		.map(c => c.name + '=' + c.value).sort()
	const before = await ours()
	expect(before.length).toBe(2)
	expect(before.every(c => c.startsWith('__Host-'))).toBe(service.protocol === 'https:')

	await page.goto(port + '/')
	await expect(page).toHaveTitle('guest')
	// The guest's response set cookies only for its own host name, and cleared none of ours.
	const set = (await context.cookies()).filter(c => ['tossed', 'own', 'wrenn_access'].includes(c.name) && c.value.length < 5)
	expect(set.map(c => c.name + ' of ' + c.domain).sort()).toEqual(['own', 'tossed', 'wrenn_access'].map(n => n + ' of ' + new URL(port).hostname))
	expect(await ours()).toEqual(before)

	const tried = await page.evaluate(async ({service, host}) => {
		const result = {cookies: document.cookie}
		for (const name of ['wrenn_access', 'wrenn_refresh', '__Host-wrenn_access', '__Host-wrenn_refresh']) {
			for (const more of ['', '; secure']) {
				for (const domain of ['', '; domain=' + host]) document.cookie = name + '=evil; path=/' + domain + more
			}
		}
		const attempt = async f => {
			try {
				return await f()
			} catch (e) {
				return e.name
			}
		}
		result.read = await attempt(async () => (await fetch(service + '/v1/me', {credentials: 'include'})).text())
		result.logout = await attempt(async () => (await fetch(service + '/v1/auth/logout', {method: 'POST', mode: 'no-cors', credentials: 'include'})).type)
		result.worker = await attempt(async () => (await navigator.serviceWorker.register(service + '/docs')).scope)
		result.script = await attempt(() => new Promise(done => {
			const script = document.createElement('script')
			script.src = service + '/v1/me'
			script.onload = () => done('loaded')
			script.onerror = () => done('refused')
			document.head.append(script)
		}))
		result.frame = await attempt(() => new Promise(done => {
			const frame = document.createElement('iframe')
			frame.src = service + '/verify'
			frame.onload = () => {
				try {
					done(frame.contentDocument ? frame.contentDocument.URL : 'another origin')
				} catch (e) {
					done(e.name)
				}
			}
			document.body.append(frame)
		}))
		return result
	}, {service: baseURL, host: service.hostname})
	expect(tried.cookies).not.toContain('wrenn_refresh')
	expect(tried.read).toBe('TypeError')
	expect(tried.worker).not.toContain('http')
	expect(tried.script).toBe('refused')
	expect(tried.frame).toBe('another origin')
	expect(await page.frameLocator('iframe').locator('form').count()).toBe(0)

	// The user's session still counts, whatever cookies the page set.
	expect(await loggedIn(context, baseURL)).toBe(email)
	expect(await ours()).toEqual(expect.arrayContaining(before))
	// The guest gets none of the service's cookies.
	await page.goto(port + '/cookies')
	expect(await page.textContent('body')).not.toContain('wrenn_')
})

test("a guest daemon's response gets no origin and keeps no cookies", async ({page, context, baseURL}) => {
	await page.goto(file)
	await expect(page.locator('p')).toHaveText('of the guest')
	await expect(page).toHaveTitle('daemon')
	expect(await page.evaluate(() => self.origin)).toBe('null')
	expect(await page.evaluate(() => {
		try {
			return document.cookie
		} catch (e) {
			return e.name
		}
	})).toBe('SecurityError')
	expect((await context.cookies()).filter(c => c.name === 'daemon')).toEqual([])
	expect(await loggedIn(context, baseURL)).toBe(email)
})
